"""What users hand over is checked, and converted where its meaning is plain, in one place.

The command line, further training and every method go through it, so that they refuse the same things in the
same words.
"""
