"A rule of the server: sign descent on the clients' mean direction, with a step that shrinks."
from fedmpqkd.federation.methods import register_method
from fedmpqkd.federation.serverrules import register_server_rule


def sign_rule(config, old, mean, memory):
    "x + lr / sqrt(t) * size * sign(mean - x); what is in `memory` survives a restart."
    new = {}
    for n, x in old.items():
        t = memory[n] = memory.get(n, 0 * x.mean()) + 1  # a tensor, so that it can be stored
        away = mean[n] - x
        new[n] = x + (config.server_lr or 1.0) / t.sqrt() * away.abs().mean() * away.sign()
    return new


register_server_rule('sign', sign_rule)
register_method('fedsign', base='fedavg', server_rule='sign')
