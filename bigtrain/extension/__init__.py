"""A run that goes on with a larger vocabulary: `extend.extend`."""
