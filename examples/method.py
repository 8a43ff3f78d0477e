"A method: FedMPQ whose server has momentum, and whose uplink is rounded stochastically."
from fedmpqkd.federation.methods import register_method

register_method('my-fedmpq', base='fedmpq', server_rule='momentum', rounding_up='stochastic')
