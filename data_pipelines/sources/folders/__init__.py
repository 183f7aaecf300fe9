"""Folders of image files: a folder for each class, or all in one beside a file of labels."""
