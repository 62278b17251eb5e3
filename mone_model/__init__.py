"""The Mixture of Neuron Experts model. Importing it changes nothing in the process.

`mone_model.megatron` holds the model on Megatron-Core; everything else needs torch alone.
"""
