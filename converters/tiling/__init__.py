"""Cutting an autoencoder's graph into pieces that run tile by tile and together compute what the whole graph computes.

Global are only sums over all positions: the moments of group norm, the K·V state of linear attention, and the keys and
values of softmax attention. The graph is cut wherever such a sum is complete; everything between two cuts sees no
further than a halo that is computed from the graph.
"""
