"""What the numbers mean that a PiPER reports about itself, in words that say what to do."""

from __future__ import annotations

from gwp_edge.drivers import piper_codec as codec

_MODES = {
    codec.MODE_STANDBY: "standby: the arm does not follow commands",
    codec.MODE_TEACH: (
        "teach mode: someone pressed the teach button; press it again to leave it; if it stays, "
        "support the arm (a reset drops it) and reset it with the vendor's tool"
    ),
    3: "ethernet control: switch the arm to CAN in the vendor's tool",
    4: "wifi control: switch the arm to CAN in the vendor's tool",
    5: "remote control: switch the remote control off",
    codec.MODE_LINKAGE: (
        "leader (linkage teaching input) role: make it a follower in the vendor's tool and "
        "switch its power off and on"
    ),
    7: "offline trajectory mode: end the trajectory in the vendor's tool",
}

_STATUSES = {
    1: (
        "emergency stop: find out why, support the arm (a reset drops it), reset it with the "
        "vendor's tool and start again"
    ),
    2: "no solution for the target",
    3: "singular position",
    4: "a target is over the arm's own angle limit",
    5: "a joint does not answer the controller: check the arm's inner cable",
    6: "a joint's brake is not released",
    7: (
        "collision detected, the arm is frozen: free it, support it (a reset drops it) and reset "
        "it with the vendor's tool"
    ),
    8: "too fast while being dragged in teach mode",
    9: "a joint reports an abnormal state",
    10: "the controller reports an error without a name",
    11: "a teach recording is running: end it with the teach button",
    12: "a taught trajectory is running: end it with the teach button",
    13: "a taught trajectory is paused: end it with the teach button",
    14: "the controller is too hot: switch off and let it cool",
    15: "the brake resistor is too hot: switch off and let it cool",
}
# Bits of the drivers' status byte; 6 (enabled) is not a fault.
_DRIVER_BITS = {
    0: "supply voltage too low: check the power supply",
    1: "motor too hot: let it cool",
    2: "driver over current",
    3: "driver too hot: let it cool",
    4: "collision detected",
    5: "driver error",
    7: "motor stalled: something blocks it",
}
DRIVER_FAULT = 0b1011_1111
_GRIPPER_BITS = {
    0: "supply voltage too low: check the power supply",
    1: "motor too hot: let it cool",
    2: "driver over current",
    3: "driver too hot: let it cool",
    4: "sensor error",
    5: "driver error",
}
GRIPPER_FAULT = 0b0011_1111


def mode(number: int) -> str:
    """Return what the control mode ``number`` of 0x2A1 is called, and how to leave it."""
    return _MODES.get(number, f"unknown control mode {number}")


def status(number: int) -> str:
    """Return what the arm status ``number`` of 0x2A1 means."""
    return _STATUSES.get(number, f"unknown arm status {number}")


def driver(value: int) -> str:
    """Return what the fault bits of a joint driver's status byte mean."""
    return _bits(value, _DRIVER_BITS)


def gripper(value: int) -> str:
    """Return what the fault bits of the gripper's status byte mean."""
    return _bits(value, _GRIPPER_BITS)


def joints(mask: int) -> str:
    """Return the joints whose bits are set, bit 0 for joint 1."""
    return ", ".join(f"joint {j + 1}" for j in range(codec.N_JOINTS) if mask >> j & 1)


def _bits(value: int, words: dict[int, str]) -> str:
    return ", ".join(text for bit, text in words.items() if value >> bit & 1)
