"""Densities that are sampled afresh: toys in the plane, conditional ones, lattices, particles, energies."""
