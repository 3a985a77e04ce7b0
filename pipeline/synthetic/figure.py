"""Articulated people: joints and angles in, named body parts out."""

from __future__ import annotations

from pipeline.synthetic.shapes import Part, Points, ellipse, line, smooth
from pipeline.synthetic.textures import Dice, cosine, sine

# Angles in 1/256 turns, 0 hangs down, positive to the right: torso; left upper arm, elbow, thigh, knee; right ones.
POSES = {
    "stand": (0, (-14, 4, -6, 0), (14, -4, 6, 0)),
    "walk": (4, (-26, 22, -24, -16), (26, 14, 22, -10)),
    "run": (10, (-44, 50, -40, -46), (50, 40, 46, -30)),
    "wave": (-2, (-20, -10, -8, 0), (100, 22, 8, 0)),
    "cheer": (0, (-96, -18, -16, 6), (96, 18, 16, -6)),
    "proud": (0, (-34, 66, -14, 4), (34, -66, 14, -4)),
    "dance": (-6, (-66, -50, -30, 34), (62, -56, 8, 0)),
    "star": (0, (-62, 0, -26, 0), (62, 0, 26, 0)),
    "kick": (-8, (-50, 10, -4, -6), (44, -20, 52, -12)),
    "sit": (0, (-18, 40, -44, 40), (18, -40, 44, -40)),
    "ride": (12, (44, 14, 50, -56), (52, 8, 36, -50)),
}


def figure(dice: Dice, pose: str) -> list[tuple[str, Part]]:
    """A person in a design space whose feet are near (0, 100) and whose height is about 100.

    Returns (body part, drawn part) from back to front; the body parts are Person-Part's six, spelled in small letters
    without blanks.
    """
    lean, left, right = POSES[pose]
    lean += dice.integer(-3, 3)
    heavy = dice.integer(90, 118) / 100
    hip_y = 52.0
    up = (sine(lean), -cosine(lean))
    across = (cosine(lean), sine(lean))
    neck = (up[0] * 30, hip_y + up[1] * 30)
    head = (up[0] * 42, hip_y + up[1] * 42)
    parts: list[tuple[str, Part]] = []
    limbs: list[tuple[str, Part]] = []
    for side, (arm, elbow, thigh, knee) in ((-1, left), (1, right)):
        arm, elbow = arm + lean + dice.integer(-8, 8), elbow + dice.integer(-8, 8)
        thigh, knee = thigh + dice.integer(-5, 5), knee + dice.integer(-4, 4)
        shoulder = (neck[0] + across[0] * side * 11 * heavy, neck[1] + 4 + across[1] * side * 11)
        bend = _reach(shoulder, arm, 17)
        hand = _reach(bend, arm + elbow, 16)
        hip = (side * 6 * heavy, hip_y)
        joint = _reach(hip, thigh, 23)
        foot = _reach(joint, thigh + knee, 22)
        toe = (foot[0] + side * 6, foot[1] + 2)
        parts += [
            ("lowerlegs", Part(("b", line(joint, foot, 10 * heavy)))),
            ("lowerlegs", Part(("s", line(foot, toe, 7)))),
            ("upperlegs", Part(("b", line(hip, joint, 13 * heavy)))),
        ]
        limbs += [
            ("lowerarms", Part(("b", line(bend, hand, 8.5)))),
            ("lowerarms", Part(("s", ellipse(*_reach(hand, arm + elbow, 3), 5, 5)))),
            ("upperarms", Part(("b", line(shoulder, bend, 10.5 * heavy)))),
        ]
    width = 12 * heavy
    corners = ((30, -width), (30, width), (14, width * 0.9), (-5, width), (-5, -width), (14, -width * 0.9))
    torso: Points = [(up[0] * h + across[0] * w, hip_y + up[1] * h + across[1] * w) for h, w in corners]
    body = [("torso", Part(("b", smooth(torso, 1)))), ("torso", Part(("s", ellipse(*neck, 5, 4))))]
    face = dice.choice((-1, 1))
    hair = [(-11, 2), (-12, -8), (-5, -14), (6, -14), (12, -7), (11, 2), (6, -5), (-6, -4)]
    if dice.chance(40):  # long hair falls behind the shoulders
        parts.append(("head", Part(("s", [(head[0] + x, head[1] + y) for x, y in _LONG]))))
    body += [
        ("head", Part(("b", ellipse(*head, 10.5, 12)))),
        ("head", Part(("s", smooth([(head[0] + x, head[1] + y) for x, y in hair], 1)))),
        ("head", Part(("k", ellipse(head[0] - 4 + face, head[1] + 1, 1.4, 1.8)))),
        ("head", Part(("k", ellipse(head[0] + 4 + face, head[1] + 1, 1.4, 1.8)))),
        ("head", Part(("k", ellipse(head[0] + face, head[1] + 6, 3, 0.9)))),
    ]
    # Arms behind the body or before it: both occur.
    return parts + (limbs + body if dice.chance(50) else body + limbs)


_LONG: Points = [(-12, -4), (12, -4), (15, 18), (6, 14), (-6, 14), (-15, 18)]


def _reach(start: tuple[float, float], angle: int, length: float) -> tuple[float, float]:
    return start[0] + sine(angle) * length, start[1] + cosine(angle) * length
