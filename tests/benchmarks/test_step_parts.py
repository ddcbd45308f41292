"""Where the time of a step goes."""
import torch

import nunchaku_py as nq
from benchmarks.step_parts import line, parts


def test_every_second_is_somewhere_and_products_are_linears() -> None:
    x, w = torch.randn(512, 1024), torch.randn(4096, 1024)
    found = parts(lambda: [torch.nn.functional.linear(x, w) for _ in range(20)])
    assert found["16-bit linears"] > 0.5 * found["all"] and found["attention"] == found["4-bit linears"] == 0
    assert abs(sum(found.values()) - 2 * found["all"]) < 1e-9
    linear = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(1024, 4096)).bfloat16())
    nq.quantize(linear, "rtn-int4", rules={"0.0": "w4a4"})
    found = parts(lambda: [linear(x.bfloat16()) for _ in range(5)])
    assert found["4-bit linears"] > 0.5 * found["all"] and found["16-bit linears"] == 0
    q = torch.randn(1, 4, 512, 64)
    found = parts(lambda: [torch.nn.functional.scaled_dot_product_attention(q, q, q) for _ in range(20)])
    assert found["attention"] > 0.5 * found["all"] and "attention" in line(found)
