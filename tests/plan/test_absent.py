"""Launches are counted from a program's text."""

from dsv4_eqx.plan.absent import launches

PROGRAM = """HloModule jit_f

%body (p: (s32[], f32[5])) -> (s32[], f32[5]) {
  %p = (s32[], f32[5]{0}) parameter(0)
  %a = f32[5]{0} fusion(%p), kind=kLoop, calls=%inner
  %b = f32[5]{0} custom-call(%a), custom_call_target="product"
  ROOT %t = (s32[], f32[5]{0}) tuple(%p, %b)
}

%cond (p: (s32[], f32[5])) -> pred[] {
  ROOT %c = pred[] fusion(%p), kind=kLoop, calls=%inner2
}

%short (p: f32[5]) -> f32[5] {
  ROOT %x = f32[5]{0} fusion(%p), kind=kLoop, calls=%inner
}

%long (p: f32[5]) -> f32[5] {
  %x = f32[5]{0} fusion(%p), kind=kLoop, calls=%inner
  ROOT %y = f32[5]{0} copy(%x)
}

ENTRY %main (p: f32[5]) -> f32[5] {
  %p = f32[5]{0} parameter(0)
  %begin = (s32[], f32[5]{0}) tuple(%p, %p)
  %known = (s32[], f32[5]{0}) while(%begin), condition=%cond, body=%body, KNOWN
  %unknown = (s32[], f32[5]{0}) while(%known), condition=%cond, body=%body, \
metadata={op_name="jit(f)/while"}
  %e = f32[5]{0} get-tuple-element(%unknown), index=1
  %one = f32[5]{0} conditional(%e, %e, %e), branch_computations={%short, %long}
  ROOT %other = f32[5]{0} fusion(%one), kind=kLoop, calls=%inner
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"7"}}'


def test_launches_in_loops_count_as_often_as_they_run():
    # 7 rounds of 2 kernels, a round of unknown number, the longer branch, and a fusion.
    found = launches(PROGRAM.replace("KNOWN", KNOWN))
    assert found.kernels == 7 * 2 + 2 + 2 + 1
    assert found.unknown_loops == ("jit(f)/while",)


def test_a_loop_without_a_count_is_named():
    found = launches(PROGRAM.replace(", KNOWN", ""))
    assert found.unknown_loops == ("body", "jit(f)/while")
