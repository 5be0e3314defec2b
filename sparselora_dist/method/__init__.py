"""The method as functions on tensors: no distribution, no Transformers.

tokens      which positions are dense, context, padding
channels    which rows of which matrix a channel owns under grouped-query attention
estimator   low-rank factors of a frozen matrix
schedule    when in a run the sparse steps are
flops       what a step costs, dense and as executed
"""
