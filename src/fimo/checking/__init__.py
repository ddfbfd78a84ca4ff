"""A check of one's own model before anything long is run: can what will be measured be trusted here?"""
