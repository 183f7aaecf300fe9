"""From encoded photos to pixels: which window of a photo is shown, and what decodes and resizes it."""
