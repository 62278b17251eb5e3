"""The fast paths of neuron selection and the experts, one module for each kind of machine; imported where they are used."""
