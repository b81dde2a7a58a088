"""Do models of equal size and unequal shape divide their features? The study, in its smallest form.

    python examples/11_study_in_quick_mode.py FOLDER

Trains two models of each of two shapes for a few seconds, counts two layers of each, and says what
follows, which at this size is that nothing can be said: it shows that every part runs. With
`sf.study.Protocol()` in place of the quick one it is the study of the README.
"""

import sys
import tempfile

import saefeat as sf


def main() -> None:
    protocol = sf.study.PRESETS["quick"]()
    narrow, wide = protocol.shapes
    print(f"{narrow.label} and {wide.label}: {narrow.n_parameters:,} parameters each")
    out = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="study-")
    findings = sf.study.run_study(out, protocol)
    for label, loss in findings.losses.items():
        print(f"{label}: {loss.value:.3f} nats a byte")
    for part in findings.parts:
        print(f"{part.site}, by {part.instrument}: {part.verdict.sentence}")
    print(f"Everything that was seen, and two pictures: {out}")


# Models are trained and looked at in processes of their own, which import this file.
if __name__ == "__main__":
    main()
