"""What the tests of live PEFT models share."""

import peft
import torch

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55], [2, 4, 6, 8, 10, 12, 14]])
BIASED = {"attention_bias": True, "mlp_bias": True}


def config(**options):
    values = {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**values | options)


def randomise(model, seed=5):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) * 0.3
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return model


def run(model, ids=IDS, **options):
    """Logits and all gradients; the same random numbers for each model."""
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(input_ids=ids, **options).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
