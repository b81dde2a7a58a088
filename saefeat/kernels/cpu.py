"""Kernels for processors: `stock`, and compiled loops where a profile shows that they win."""

from saefeat.kernels import compiled_products, compiled_pursuit, compiled_selection, stock

top_k = compiled_selection.top_k
batch_top_k = compiled_selection.batch_top_k
above = compiled_selection.above
sampled_product = compiled_products.sampled_product
product = compiled_products.product
transposed_product = compiled_products.transposed_product
latent_sums = stock.latent_sums
matching_pursuit = compiled_pursuit.matching_pursuit
