"""How good is a network: accuracy of classifiers, probes and collapse signals of features.

Nothing here knows how a network is built: iterables of batches and a callable go in, numbers come out.
"""
