#!/usr/bin/env bash
# Prints a Kubernetes indexed Job (and the service that its pods find each other by) for a training.
#   bash scripts/kubernetes.sh NAME IMAGE NODES CONFIG [KEY=VALUE]... | kubectl apply -f -
# IMAGE has this project in /opensora and its Python first in the path; the volume claim of the name
# given by CLAIM (default: opensora) is mounted at /outputs. GPUS: of a pod (default 8). A pod that
# ends with 75 was told to stop; it starts again and the run goes on, without counting as a failure.
set -euo pipefail

if [[ $# -lt 4 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "kubernetes.sh: give NAME IMAGE NODES CONFIG [KEY=VALUE]..." >&2
    exit 64
fi
name=$1 image=$2 nodes=$3
shift 3
if [[ ! $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]]; then
    echo "kubernetes.sh: the name '$name' needs lower-case letters, digits and dashes" >&2
    exit 64
fi
quote() { printf '"%s"' "$(sed 's/[\\"]/\\&/g' <<<"$1")"; }
arguments=""
for argument in /opensora/scripts/train.sh "$@"; do
    arguments+="${arguments:+, }$(quote "$argument")"
done

cat <<YAML
apiVersion: v1
kind: Service
metadata: {name: $name}
spec:
  clusterIP: None
  selector: {job-name: $name}
---
apiVersion: batch/v1
kind: Job
metadata: {name: $name}
spec:
  completionMode: Indexed
  completions: $nodes
  parallelism: $nodes
  backoffLimit: 10
  podFailurePolicy:
    rules:
      - {action: Ignore, onExitCodes: {operator: In, values: [75]}}
      - {action: FailJob, onExitCodes: {operator: In, values: [64, 65, 66, 70, 71]}}
      - {action: Ignore, onPodConditions: [{type: DisruptionTarget}]}
  template:
    metadata: {labels: {job-name: $name}}
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 180
      containers:
        - name: train
          image: $(quote "$image")
          workingDir: /outputs
          command: [bash, $arguments]
          env:
            - {name: NNODES, value: "$nodes"}
            - {name: NPROC, value: "${GPUS:-8}"}
            - {name: MASTER_ADDR, value: $name-0.$name}
            - name: NODE_RANK
              valueFrom:
                fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
          resources: {limits: {nvidia.com/gpu: "${GPUS:-8}"}}
          volumeMounts:
            - {name: outputs, mountPath: /outputs}
            - {name: shm, mountPath: /dev/shm}
      volumes:
        - {name: outputs, persistentVolumeClaim: {claimName: ${CLAIM:-opensora}}}
        - {name: shm, emptyDir: {medium: Memory}}
YAML
