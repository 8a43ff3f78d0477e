"A distillation loss: the total variation between teacher and student."
from fedmpqkd.federation.methods import register_method
from fedmpqkd.learn.distill import register_distill_loss


def total_variation(student, teacher, labels, temperature, weight):
    "Logits [M, C] of both; labels [M]; weights of the samples [M] or None -> one number, 0 where they agree."
    p, q = (teacher.detach() / temperature).softmax(1), (student / temperature).softmax(1)
    each = temperature**2 * (p - q).abs().sum(1) / 2  # [M]
    return (each if weight is None else weight * each).mean()


register_distill_loss('total-variation', total_variation)
register_method('fedmpq-kd-tv', base='fedmpq-kd', kd_loss='total-variation')
