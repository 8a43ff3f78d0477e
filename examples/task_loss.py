"A loss of the labels: focal loss (Lin et al., 2017), for samples that are hard."
from fedmpqkd.federation.methods import register_method
from fedmpqkd.learn.terms import register_task_loss


def focal(logits, labels, gamma=2.0):
    "[M, C] and [M] -> one number."
    p = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return -((1 - p) ** gamma * p.clamp(min=1e-7).log()).mean()


register_task_loss('focal', focal)
register_method('fedavg-focal', base='fedavg', task_loss='focal')
