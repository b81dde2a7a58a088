"""Kernels for processors: `stock`, and compiled loops where a profile shows that they win."""

from saefeat.kernels import compiled_pursuit, compiled_selection, stock

top_k = compiled_selection.top_k
batch_top_k = compiled_selection.batch_top_k
above = compiled_selection.above
sampled_product = stock.sampled_product
product = stock.product
transposed_product = stock.transposed_product
latent_sums = stock.latent_sums
matching_pursuit = compiled_pursuit.matching_pursuit
