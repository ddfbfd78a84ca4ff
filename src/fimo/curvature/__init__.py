"""Gradients, Jacobians, curvature matrices and solvers, shared by methods."""
