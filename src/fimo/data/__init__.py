"""Where instances come from: tables, images, texts, what users hold."""
