"""Training and evaluation of the models that fusionserve serves."""
