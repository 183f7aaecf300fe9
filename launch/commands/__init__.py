"""What commands do once their words are read: a module for each, imported no sooner, as torch takes seconds."""
