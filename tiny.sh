cd /work/main
python - <<'P' > /tmp/try/words
import sys; sys.path.insert(0,'tests')
from tiny_run import *
s=convert_shards(Path('/tmp/try/shards'))
print('\n'.join(tiny_overrides('finetune', s, Path('/tmp/try/runs'))))
P
