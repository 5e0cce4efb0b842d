"""``python -m fused_peft``: what was built, what runs here, what falls back and why."""

from fused_peft.diagnostics import report

if __name__ == "__main__":
    print(report())
