"""How good a model is: HellaSwag, perplexity, LAMBADA, validation loss."""
