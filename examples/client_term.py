"A term of the clients: the clients' half of FedDyn (Acar et al., 2021)."
import torch

from fedmpqkd.federation.methods import register_method
from fedmpqkd.learn.terms import ClientTerm, register_client_term


class FedDyn(ClientTerm):
    "mu/2 |w - w_t|^2 - <h, w>, and afterwards h <- h - mu (w - w_t)."
    remembers, mu = True, 0.1

    def __init__(self, local):
        super().__init__(local)
        self.start = {n: p.detach().clone() for n, p in local.parameters.items()}
        self.h = {n: local.memory.get(n, torch.zeros_like(p)) for n, p in self.start.items()}

    def change_gradients(self):
        for n, p in self.local.parameters.items():
            if p.grad is not None: p.grad += self.mu * (p.detach() - self.start[n]) - self.h[n]

    def finish(self, steps):
        moved = {n: p.detach() - self.start[n] for n, p in self.local.parameters.items()}
        return {n: (self.h[n] - self.mu * d).cpu() for n, d in moved.items()}, {}


register_client_term('feddyn', FedDyn)
register_method('feddyn', base='fedavg', client_term='feddyn')
