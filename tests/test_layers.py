from tests.tiny import tiny_config
import dsv4_eqx as d
def test_a():
    tiny_config()
def test_b():
    d.Config.flash()
def test_c():
    try:
        tiny_config(hidden_size="x")
    except ValueError: pass
def test_d():
    try:
        tiny_config(rope_theta=float("nan"))
    except ValueError: pass
def test_e():
    d.YarnScaling(16, 65536)
