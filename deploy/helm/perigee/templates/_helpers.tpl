{{- /* Everything below takes a context of one service: root ($), service (its name), values (its values). */ -}}
{{- define "perigee.name" -}}
{{ printf "%s-%s" (.root.Release.Name | trunc 40 | trimSuffix "-") .service }}
{{- end }}

{{- define "perigee.selector" -}}
app.kubernetes.io/name: perigee
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .service }}
{{- end }}

{{- define "perigee.metadata" -}}
name: {{ include "perigee.name" . }}
labels:
  {{- include "perigee.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- /* Kind of a service's workload. Workers and ranks have names of their own, which certificates can cover. */ -}}
{{- define "perigee.kind" -}}
{{- if eq .service "trainer" }}{{ .values.controller }}
{{- else if or (eq .service "rollout") (and (eq .service "buffer") (not .root.Values.redis.secret)) }}StatefulSet
{{- else }}Deployment
{{- end }}
{{- end }}

{{- /* Name of a service for the others: the first rank of the trainer, all replicas of another. Every Service here is
       headless, for a channel to a cluster address would stay with one replica. */ -}}
{{- define "perigee.address" -}}
{{- $values := index .root.Values.services .service }}
{{- $host := printf "%s.%s.svc" (include "perigee.name" .) .root.Release.Namespace }}
{{- if not $values.enabled }}
{{- required (printf "peers.%s: is required, since services.%s.enabled is false: give host:port" .service .service) (index .root.Values.peers .service) }}
{{- else if eq .service "trainer" }}{{ include "perigee.name" . }}-0.{{ $host }}:{{ $values.port }}
{{- else }}dns:///{{ $host }}:{{ $values.port }}
{{- end }}
{{- end }}

{{- define "perigee.peerEnv" -}}
{{- range .peers }}
- {name: PERIGEE_{{ $.service | upper }}__{{ . | upper }}_ADDRESS, value: {{ include "perigee.address" (dict "root" $.root "service" .) | quote }}}
{{- end }}
{{- end }}

{{- /* Folder or URL of what runs read and write. */ -}}
{{- define "perigee.runs" -}}{{ .Values.runs.url | default .Values.runs.path }}{{- end }}

{{- /* Folder that `perigee prepare` fills, of each recipe by its name. */ -}}
{{- define "perigee.prepared" -}}
{{ include "perigee.runs" . }}/{{ (.Values.recipe | fromYaml).name | default "run" }}
{{- end }}

{{- /* The recipe as `perigee prepare` writes it, without placeholders and script. */ -}}
{{- define "perigee.recipe" -}}
{{- $prepared := include "perigee.prepared" . }}
{{- $recipe := regexReplaceAll "(?m)^prepare:.*\n" .Values.recipe "" }}
{{- $recipe | replace "{data}" (printf "%s/data" $prepared) | replace "{run}" $prepared | replace "{recipe}" (dir .Values.prepare.recipe) }}
{{- end }}

{{- /* Credentials of the command line and of calls to peers. */ -}}
{{- define "perigee.clientEnv" -}}
- {name: HOME, value: /tmp}
- {name: PERIGEE_TOKEN_FILE, value: /etc/perigee/auth/token}
{{- if .root.Values.tls.secret }}
- {name: PERIGEE_CA_FILE, value: /etc/perigee/tls/ca.crt}
- {name: PERIGEE_CERT_FILE, value: /etc/perigee/tls/tls.crt}
- {name: PERIGEE_KEY_FILE, value: /etc/perigee/tls/tls.key}
{{- end }}
{{- end }}

{{- define "perigee.env" }}
{{- $prefix := printf "PERIGEE_%s__" (upper .service) }}
{{- $root := .root.Values }}
- {name: HOME, value: /tmp}
- {name: PERIGEE_TOKEN_FILE, value: /etc/perigee/auth/token}
{{- if $root.auth.callersSecret }}
- {name: PERIGEE_CALLERS_FILE, value: /etc/perigee/auth/callers.yaml}
{{- end }}
- {name: {{ $prefix }}SERVER__HOST, value: {{ $root.listen | quote }}}
- {name: {{ $prefix }}SERVER__PORT, value: {{ .values.port | quote }}}
- {name: {{ $prefix }}SERVER__METRICS_PORT, value: "9100"}
- {name: {{ $prefix }}SERVER__DRAIN_SECONDS, value: {{ sub .values.gracePeriodSeconds 15 | quote }}}
- {name: {{ $prefix }}TELEMETRY__LOG_LEVEL, value: {{ $root.telemetry.logLevel }}}
{{- with $root.telemetry.otlpEndpoint }}
- {name: {{ $prefix }}TELEMETRY__OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- if $root.tls.secret }}
- {name: {{ $prefix }}SERVER__TLS_CERT_FILE, value: /etc/perigee/tls/tls.crt}
- {name: {{ $prefix }}SERVER__TLS_KEY_FILE, value: /etc/perigee/tls/tls.key}
- {name: {{ $prefix }}SERVER__TLS_CA_FILE, value: /etc/perigee/tls/ca.crt}
- {name: {{ $prefix }}SERVER__TLS_VERIFY_CLIENTS, value: {{ $root.tls.mutual | quote }}}
{{- end }}
{{- with .values.httpPort }}
- {name: {{ $prefix }}HTTP__PORT, value: {{ . | quote }}}
{{- end }}
{{- if eq .service "coordinator" }}
- {name: PERIGEE_COORDINATOR__RUN_PATH, value: {{ include "perigee.runs" .root }}/coordinator}
{{- include "perigee.peerEnv" (merge (dict "peers" (list "buffer" "trainer" "reward")) .) }}
{{- else if eq .service "buffer" }}
- {name: PERIGEE_BUFFER__DATA_PATH, value: /data/buffer}
{{- with $root.redis.secret }}
- name: PERIGEE_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ . }}, key: url}}
{{- end }}
{{- else if eq .service "reward" }}
{{- include "perigee.peerEnv" (merge (dict "peers" (list "sandbox")) .) }}
{{- else if eq .service "sandbox" }}
{{- /* The kernel shows all cores of the node, not those of the limit. */}}
- name: PERIGEE_SANDBOX__SLOTS
  valueFrom: {resourceFieldRef: {containerName: sandbox, resource: limits.cpu}}
{{- else }}
{{- include "perigee.peerEnv" (merge (dict "peers" (ternary (list "buffer" "coordinator" "trainer") (list "buffer") (eq .service "rollout"))) .) }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: PERIGEE_ADVERTISE_HOST, value: {{ include "perigee.podHost" . | quote }}}
- {name: {{ $prefix }}WEIGHTS__MIN_RPC_PORT, value: {{ $root.weightPorts.first | quote }}}
- {name: {{ $prefix }}WEIGHTS__MAX_RPC_PORT, value: {{ $root.weightPorts.last | quote }}}
{{- if .values.rdma }}
- {name: {{ $prefix }}WEIGHTS__TRANSPORT, value: rdma}
{{- end }}
{{- end }}
{{- if eq .service "rollout" }}
- {name: PERIGEE_ROLLOUT__WORKER_ID, value: $(POD_NAME)}
- {name: PERIGEE_ROLLOUT__MODEL, value: "null"}{{/* the trainer gives its configuration and tokenizer */}}
{{- else if eq .service "trainer" }}
- {name: PERIGEE_TRAINER__RUN_PATH, value: {{ include "perigee.runs" .root }}/trainer}
{{- if gt (int .values.nodes) 1 }}
- {name: PERIGEE_TRAINER__NODES, value: {{ .values.nodes | quote }}}
- {name: PERIGEE_TRAINER__MASTER_PORT, value: "29500"}
{{- if eq .values.controller "LeaderWorkerSet" }}
- {name: PERIGEE_TRAINER__NODE_RANK, value: $(LWS_WORKER_INDEX)}
- {name: PERIGEE_TRAINER__MASTER_ADDRESS, value: $(LWS_LEADER_ADDRESS)}
{{- else }}
- name: PERIGEE_TRAINER__NODE_RANK
  valueFrom: {fieldRef: {fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']"}}
- {name: PERIGEE_TRAINER__MASTER_ADDRESS, value: {{ include "perigee.address" . | splitList ":" | first }}}
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $value := .values.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- /* Host of a pod for its peers: its address; with certificates, a name that these cover. */ -}}
{{- define "perigee.podHost" -}}
{{- if .root.Values.tls.secret }}$(POD_NAME).{{ include "perigee.name" . }}.{{ .root.Release.Namespace }}.svc
{{- else }}$(POD_IP)
{{- end }}
{{- end }}

{{- /* Credentials of object storage, for those who read or write there. */ -}}
{{- define "perigee.storageEnv" -}}
{{- if and .root.Values.runs.secret (or (has .service (list "trainer" "coordinator" "train")) (contains "://" (include "perigee.offload" .))) -}}
envFrom: [{secretRef: {name: {{ .root.Values.runs.secret }}}}]
{{- end }}
{{- end }}

{{- define "perigee.usesRuns" -}}
{{- if and (or (has .service (list "trainer" "coordinator" "prepare" "train")) (hasPrefix (printf "%s/" .root.Values.runs.path) (include "perigee.offload" .))) (not .root.Values.runs.url) }}true{{ end }}
{{- end }}

{{- /* Where the buffer moves long trajectories, empty for nowhere and for other services. A folder is on a volume that
       outlasts the pod, and that all replicas have. */ -}}
{{- define "perigee.offload" -}}
{{- if eq .service "buffer" }}
{{- $recipe := include "perigee.recipe" .root | fromYaml }}
{{- $location := get (.values.env | default dict) "PERIGEE_BUFFER__OFFLOAD__LOCATION" | default (($recipe.buffer | default dict).offload | default dict).location | default "" }}
{{- $onRuns := and (not .root.Values.runs.url) (hasPrefix (printf "%s/" .root.Values.runs.path) $location) }}
{{- $onData := and (not .root.Values.redis.secret) (hasPrefix "/data/" $location) }}
{{- if not (or (not $location) (contains "://" $location) $onRuns $onData) }}
{{- fail (printf "buffer.offload.location: %s is on no volume of the buffer: give a folder of runs.path, {run}/offload for one, or a URL" $location) }}
{{- end }}
{{- $location }}
{{- end }}
{{- end }}

{{- define "perigee.podSecurity" -}}
seccompProfile: {type: RuntimeDefault}
{{- if eq .service "sandbox" }}
{{- /* It makes namespaces and mounts. */}}
runAsUser: 0
runAsGroup: 0
{{- else }}
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
runAsGroup: 10001
{{- if dig "rdma" "ipcLock" false .values }}
{{- /* The capability reaches no other user. */}}
runAsUser: 0
{{- else }}
runAsUser: 10001
runAsNonRoot: true
{{- end }}
{{- end }}
{{- end }}

{{- define "perigee.containerSecurity" -}}
readOnlyRootFilesystem: true
{{- if eq .service "sandbox" }}
{{- /* SYS_ADMIN allows it anyway, and the API server refuses the contrary. */}}
allowPrivilegeEscalation: true
capabilities:
  drop: [ALL]
  add: [CHOWN, DAC_OVERRIDE, FOWNER, KILL, MKNOD, NET_ADMIN, SETGID, SETPCAP, SETUID, SYS_ADMIN, SYS_CHROOT]
{{- /* The default profile of AppArmor forbids mounts. */}}
appArmorProfile: {type: Unconfined}
{{- else }}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  {{- if dig "rdma" "ipcLock" false .values }}
  add: [IPC_LOCK]
  {{- end }}
{{- end }}
{{- end }}

{{- define "perigee.image" -}}
image: "{{ .root.Values.image.registry }}/{{ .values.image }}:{{ .values.tag | default .root.Values.image.tag | default .root.Chart.AppVersion }}{{ with .values.variant }}-{{ . }}{{ end }}"
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- end }}

{{- define "perigee.resources" -}}
{{- $resources := deepCopy .values.resources }}
{{- with .values.rdma }}
{{- $_ := set $resources "limits" (merge (dict .resource .count) ($resources.limits | default dict)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- /* Only rank 0 of a trainer of several nodes serves. */ -}}
{{- define "perigee.probe" -}}
{{- if and (eq .service "trainer") (gt (int .values.nodes) 1) -}}
exec:
  command:
    - sh
    - -c
    - test "$PERIGEE_TRAINER__NODE_RANK" != 0 || exec python -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:9100{{ .path }}", timeout=4)'
{{- else -}}
httpGet: {path: {{ .path }}, port: metrics}
{{- end }}
timeoutSeconds: 5
{{- end }}

{{- define "perigee.volumeMounts" -}}
- {name: recipe, mountPath: /etc/perigee/recipe.yaml, subPath: recipe.yaml, readOnly: true}
- {name: auth, mountPath: /etc/perigee/auth, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .root.Values.tls.secret }}
- {name: tls, mountPath: /etc/perigee/tls, readOnly: true}
{{- end }}
{{- if include "perigee.usesRuns" . }}
- {name: runs, mountPath: {{ .root.Values.runs.path }}}
{{- end }}
{{- if .values.shm }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- if eq .service "buffer" }}
- {name: data, mountPath: /data}
{{- else if eq .service "sandbox" }}
- {name: run, mountPath: /run}
{{- end }}
{{- end }}

{{- define "perigee.volumes" -}}
- {name: recipe, configMap: {name: {{ include "perigee.name" (merge (dict "service" "recipe") .) }}}}
- name: auth
  projected:
    defaultMode: 0440
    sources:
      - secret: {name: {{ .root.Values.auth.secret }}, items: [{key: token, path: token}]}
      {{- with .root.Values.auth.callersSecret }}
      - secret: {name: {{ . }}, items: [{key: callers.yaml, path: callers.yaml}]}
      {{- end }}
- {name: tmp, emptyDir: {sizeLimit: {{ .values.tmp | default "8Gi" }}}}
{{- with .root.Values.tls.secret }}
- {name: tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- if include "perigee.usesRuns" . }}
- {name: runs, persistentVolumeClaim: {claimName: {{ .root.Values.runs.existingClaim | default (include "perigee.name" (merge (dict "service" "runs") .)) }}}}
{{- end }}
{{- with .values.shm }}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ . }}}}
{{- end }}
{{- if and (eq .service "buffer") .root.Values.redis.secret }}
- {name: data, emptyDir: {sizeLimit: 1Gi}}
{{- else if eq .service "sandbox" }}
- {name: run, emptyDir: {medium: Memory, sizeLimit: 64Mi}}
{{- end }}
{{- end }}

{{- define "perigee.placement" -}}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ .values.spreadBy | default "kubernetes.io/hostname" }}
    {{- /* A pod of the trainer takes the devices of a node. */}}
    whenUnsatisfiable: {{ ternary "DoNotSchedule" "ScheduleAnyway" (eq .service "trainer") }}
    labelSelector:
      matchLabels: {{- include "perigee.selector" . | nindent 8 }}
{{- $class := ternary "run" "worker" (has .service (list "coordinator" "buffer" "trainer")) }}
{{- with .values.priorityClassName | default (ternary (printf "%s-%s-%s" .root.Release.Namespace .root.Release.Name $class) "" .root.Values.priorityClasses.create) }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "perigee.pod" -}}
metadata:
  labels:
    {{- include "perigee.selector" . | nindent 4 }}
    {{- with .values.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    {{- /* A change of the section `run` restarts nothing. */}}
    {{- $recipe := include "perigee.recipe" .root | fromYaml }}
    {{- $model := ternary $recipe.model "" (has .service (list "trainer" "rollout")) }}
    checksum/recipe: {{ list (get $recipe .service) $model | toYaml | sha256sum | trunc 16 }}
    {{- with .values.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  serviceAccountName: {{ include "perigee.name" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .values.gracePeriodSeconds }}
  {{- with .values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- if hasKey .values "hostUsers" }}
  hostUsers: {{ .values.hostUsers }}
  {{- end }}
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- include "perigee.podSecurity" . | nindent 4 }}
  {{- include "perigee.placement" . | trim | nindent 2 }}
  {{- if and .root.Values.prepare.enabled (eq .service "trainer") (not .root.Values.runs.url) }}
  initContainers:
    - name: wait-for-prepare
      {{- include "perigee.image" . | nindent 6 }}
      args: [sh, -c, 'until [ -e "$0" ]; do sleep 2; done', {{ include "perigee.prepared" .root }}/recipe.yaml]
      resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
      securityContext: {{- include "perigee.containerSecurity" . | nindent 8 }}
      volumeMounts: [{name: runs, mountPath: {{ .root.Values.runs.path }}, readOnly: true}]
  {{- end }}
  containers:
    - name: {{ .service }}
      {{- include "perigee.image" . | nindent 6 }}
      {{- /* Behind the image's init, which reaps the orphans of killed programs. */}}
      args: [python, -m, services.{{ .service }}, --config, /etc/perigee/recipe.yaml]
      env: {{- include "perigee.env" . | trim | nindent 8 }}
      {{- with include "perigee.storageEnv" . }}{{ . | nindent 6 }}{{ end }}
      ports:
        - {name: grpc, containerPort: {{ .values.port }}}
        - {name: metrics, containerPort: 9100}
        {{- with .values.httpPort }}
        - {name: http, containerPort: {{ . }}}
        {{- end }}
      startupProbe:
        {{- include "perigee.probe" (merge (dict "path" "/healthz") .) | nindent 8 }}
        periodSeconds: 5
        failureThreshold: {{ div .values.startupSeconds 5 }}
      livenessProbe:
        {{- include "perigee.probe" (merge (dict "path" "/healthz") .) | nindent 8 }}
        periodSeconds: 10
        failureThreshold: 6
      readinessProbe:
        {{- include "perigee.probe" (merge (dict "path" "/readyz") .) | nindent 8 }}
        periodSeconds: 5
      {{- if .values.httpPort }}
      {{- /* HTTP callers go on to a pod that ends until its address is gone from the Service. */}}
      lifecycle: {preStop: {sleep: {seconds: 5}}}
      {{- end }}
      resources: {{- include "perigee.resources" . | trim | nindent 8 }}
      securityContext: {{- include "perigee.containerSecurity" . | nindent 8 }}
      volumeMounts: {{- include "perigee.volumeMounts" . | nindent 8 }}
  volumes: {{- include "perigee.volumes" . | nindent 4 }}
{{- end }}
