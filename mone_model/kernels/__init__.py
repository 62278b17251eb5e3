"""The fast paths of neuron selection and the experts, and on CPUs of what surrounds them; imported where they are used."""
