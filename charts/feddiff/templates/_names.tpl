{{/* One installation per cluster: the ledger's policy names one operator. So names are fixed, and documents can quote them. */}}

{{- define "feddiff.labels" -}}
app.kubernetes.io/name: feddiff
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "feddiff.operatorLabels" -}}
app.kubernetes.io/name: feddiff
app.kubernetes.io/component: operator
{{- end }}

{{/* What a helm test may reach: the operator's port, nothing else. */}}
{{- define "feddiff.testLabels" -}}
app.kubernetes.io/name: feddiff
app.kubernetes.io/component: test
{{- end }}

{{- define "feddiff.image" -}}
{{- $image := index . 0 -}}
{{- $chart := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default $chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "feddiff.operatorUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:feddiff-operator
{{- end }}

{{/* Pod Security "restricted", and a root filesystem that nobody writes to. */}}
{{- define "feddiff.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "feddiff.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "feddiff.namespaces" -}}
{{ concat .Values.jobNamespaces .Values.ownerNamespaces | uniq | sortAlpha | toJson }}
{{- end }}

{{/* The alerts of alerts.yaml, which speaks of the usual namespace. */}}
{{- define "feddiff.alerts" -}}
{{ .Files.Get "alerts.yaml" | replace "--namespace feddiff-system" (printf "--namespace %s" .Release.Namespace) }}
{{- end }}
