"""The texts that `cloister init` fills in: the documents, the script, and the guides for either side."""

from __future__ import annotations

from string import Template

FEDERATION = Template("""\
# $about
#
# All parties agree on this document, and each data owner sees it before taking part. Written by `cloister init`; edit
# it before anybody joins. Cloister's docs/federation-file.md has every key.
name: $name

$schema
model: {hidden: $hidden, activation: relu}

training:
  rounds: $rounds
  local_steps: $local_steps # of each participant in a round
  batch_size: $batch_size
  optimizer: sgd
  learning_rate: $learning_rate
  loss: $loss

# Each participant takes part in each round, and a round waits so many seconds for the slowest.
strategy: {name: fedavg, fraction: 1.0, min_clients: $clients, round_timeout: 120}

privacy:
$privacy
  client: null
  evaluation: {every: $every$noise} # counts of right and wrong, after so many rounds
""")

ROW = Template("""\
  # Each row of each participant, against whoever sees all messages; each participant adds its own noise.
  row: {epsilon: $epsilon, delta: $delta, clip: $clip, sampling_rate: $sampling_rate, count_epsilon: null}""")

NO_ROW = "  row: null # NO differential privacy: updates can reveal rows"

CLIENT = Template("""\
# What is local to $participant. Paths are relative to this file; Cloister's docs/client-file.md has every key.
server: "$server"
tls: {ca: certs/ca.pem, certificate: certs/$participant.pem, key: certs/$participant.key}
data: {path: table.csv, name: $participant-$federation}
device: auto # the GPU if there is one that computes exactly, else the processor
state: state # the ledger of this table's budget, and the models that this participant has: back it up
policy:
$policy
  approved: any-within-policy # or: ask, or the fingerprints of the documents that you agree to
""")

POLICY = Template("""\
  epsilon: $epsilon # all federations together may cost one row of this table so much ...
  delta: $delta # ... at this delta""")

NO_PRIVACY_POLICY = """
  without_privacy: true # this federation asks for NO differential privacy: its updates can reveal rows"""

SCRIPT = Template("""\
#!/bin/sh
# The certificates of federation $federation, and each participant's beside its client file. Run it once, on the machine
# where the authority's key (certs/ca.key) may stay:
#
#     sh certificates.sh
set -eu
cd "$$(dirname "$$0")"
cloister=$cloister
cloister="$${CLOISTER:-$$cloister}"
"$$cloister" certs init
"$$cloister" certs server $hosts
"$$cloister" certs operator
for name in $participants; do
    "$$cloister" certs client "$$name"
    mkdir -p "participants/$$name/certs"
    cp certs/ca.pem "certs/$$name.pem" "participants/$$name/certs/"
    mv "certs/$$name.key" "participants/$$name/certs/"
done
""")

COORDINATOR = Template("""\
# Federation $federation

Written by `cloister init`, for whoever coordinates. Each participant gets its folder under `participants/`, and nothing
else.

1. Read `federation.yaml`$warned.
   It is what all parties agree on; `cloister check federation.yaml` says what it means, and
   `cloister plan federation.yaml --rows $rows` what it costs each row of such a table. Its settings were chosen for
   $clients tables of about $rows rows; for others, `cloister plan federation.yaml --rows N --suggest` proposes more.
2. Try it on this machine, without a network:

       $simulate

3. Make the certificates: `sh certificates.sh`. Keep `certs/ca.key` where only you read it.
4. Send each participant its folder `participants/NAME`, over a way that others cannot read: its key is in it.
5. `cloister doctor federation.yaml --certificates certs --address $listen`, and then the server, which waits for all
   $clients participants:

       cloister serve federation.yaml --certificates certs --address $listen

6. When the run is over, its folder under `runs/` has the model and `report.html`. Each participant has the model, too.
""")

PARTICIPANT = Template("""\
# $participant in federation $federation

You take part in training one model with $others. Your table stays with you: only model updates
leave$noised.

1. Install Cloister as its README says (Python 3.11 or newer); on Windows the command is `.venv\\Scripts\\cloister`.
$table
3. Read `client.yaml`, above all its `policy`: what all federations together may cost one row of your table. It is yours
   to change. Your key is `certs/$participant.key`: whoever has it can take part in your name.
4. Once whoever coordinates says that the server is up, examine your side. Each line is ok, a warning, or wrong with
   what to do; the server hears that you asked for the federation's document, and nothing of what is found:

       cloister doctor client.yaml

5. Take part. This waits for the others, and ends when the run is over; `Ctrl-C` leaves at any time:

       cloister join client.yaml

6. Afterwards the model is yours to use, and the ledger says what was spent:

       cloister evaluate client.yaml table.csv
       cloister predict client.yaml table.csv -o predictions.csv
       cloister budget client.yaml --verify

The columns of the table, by the federation's document:

$columns
""")

OWN_TABLE = """\
2. Put your table beside this file as `table.csv` (or name another, also Parquet, in `client.yaml`). It has a header and
   the columns below; others are ignored."""
DEALT_TABLE = """\
2. `table.csv` beside this file is your table, to try things out with."""
