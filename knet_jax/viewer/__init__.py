"""The page of `python -m knet_jax.demo`: what it shows, and the application that shows it."""
