"""`python -m rqkernels`: print what is installed and which libraries loaded."""

from . import info

if __name__ == "__main__":
    for name, value in info().items():
        print(f"{name:>22}  {value}")
