"""``python -m swarmtrain_peer SITE_DIR``."""

import sys

from swarmtrain_peer.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
