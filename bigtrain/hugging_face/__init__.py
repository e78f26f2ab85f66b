"""In and out of Hugging Face folders: tensors pass one by one, so that neither way holds a whole model."""
