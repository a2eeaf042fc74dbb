"""Graph passes: dense U-Net in, record, detect and edit graphs out. ``pipeline.py`` is the ordered list."""
