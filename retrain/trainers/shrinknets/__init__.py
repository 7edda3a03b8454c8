"""ShrinkNets: learn the size of a network while training it, by a switch on every neuron.

A switch beta_j multiplies neuron j; an l1 penalty drives switches to zero; a neuron whose switch
keeps flipping around zero is cut out of the network for good, and the switches that are left are
folded into the weights.

* `switches`: the switch layers, the penalties (1) and (8);
* `network`: which modules of a Sequential lie between two layers, and where switches go;
* `group`: the baseline, group sparsity (3)/(4), with its proximal step;
* `cutting`: neurons cut out of the layers on both sides and of the optimiser's state;
* `removal`: when a neuron is dead, and the callback that cuts it;
* `fold`: the plain smaller network;
* `cost`: what training has cost;
* `regression`, `regression_solvers`: section 6.1's linear and logistic regressions;
* `method`: all of it as methods of the trainers.
"""
