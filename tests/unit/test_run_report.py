"""What a run says of itself at its end."""

from gwp_edge.run_report import Findings


def test_warning_after_an_error_does_not_hide_it():
    """Pictures that a camera had lost, said as the policy closed, once hid why it had ended."""
    findings = Findings()
    findings.note_fault("one plan was late")
    assert findings.last_fault == "one plan was late"
    findings.note_fault("the recording has ended", is_error=True)
    findings.note_fault("camera cam_high: 72 frames, 3 dropped")
    assert findings.last_fault == "the recording has ended"
    assert len(findings.faults) == 3
