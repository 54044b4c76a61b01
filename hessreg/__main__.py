"""``python -m hessreg`` is the command ``hessreg``."""

from hessreg.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
