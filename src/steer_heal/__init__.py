"""steer-heal: steer a chat model towards a trait, distil it into the weights, heal the incoherence, and repeat."""
