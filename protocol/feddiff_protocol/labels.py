"""The labels and annotations by which a job's objects on a cluster are found and read: the operator writes them, it and
the command line read them."""

MANAGER = "feddiff.dev/operator"  # spec.managedBy of the jobs that the operator carries out, where it says anything

# Labels of all that belongs to a job: batch Jobs, their pods and ConfigMaps, entries of ledgers.
JOB_UID = "feddiff.dev/job-uid"
JOB_NAME = "feddiff.dev/job"
JOB_NAMESPACE = "feddiff.dev/job-namespace"
STAGE = "feddiff.dev/stage"
CLIENT = "feddiff.dev/client"
ATTEMPT = "feddiff.dev/attempt"
DATASET = "feddiff.dev/dataset"  # of an entry
MANAGED_BY = "app.kubernetes.io/managed-by"
# The Job controller's, of a pod.
JOB_NAME_OF_POD = "batch.kubernetes.io/job-name"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"

# Annotations of a batch Job, one attempt of a stage: what is known of it once its pods are gone.
RECEIPT = "feddiff.dev/receipt"
STOPPED = "feddiff.dev/stopped"  # why the operator suspended it: a Reason; a deadline's makes it a failure
STOPPED_BECAUSE = "feddiff.dev/stopped-because"  # the same in words
EXIT_CODE = "feddiff.dev/exit-code"  # a number, or one of the two words below; goes with MESSAGE
MESSAGE = "feddiff.dev/message"
LOST, UNKNOWN = "lost", "unknown"  # taken away by the platform; ended without an exit code

ACKNOWLEDGE = "feddiff.dev/acknowledge-ledger"  # annotation of a dataset, by its owner: the contradiction is accepted
