"""Fast paths of neuron selection and experts; imported where they are used."""
