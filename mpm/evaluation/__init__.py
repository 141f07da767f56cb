"""How good is a network: accuracy and calibration of classifiers, probes and collapse signals of features.

Nothing here knows how a network is built: batches and a callable go in, numbers and pictures come out.
"""
