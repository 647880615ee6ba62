;; Tries to set fields that no answer may have: line ends, bad names, framing of the connection. Traps unless each is
;; refused for its own reason; then answers 204.
(component $guest
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type (sub resource)))
    (export "fields" (type $fields (sub resource)))
    (export "outgoing-response" (type $outgoing-response (sub resource)))
    (export "response-outparam" (type $response-outparam (sub resource)))
    (type $header-error-cases (variant (case "invalid-syntax") (case "forbidden") (case "immutable")))
    (export "header-error" (type $header-error (eq $header-error-cases)))
    (type $dns-payload-fields (record (field "rcode" (option string)) (field "info-code" (option u16))))
    (export "DNS-error-payload" (type $dns-payload (eq $dns-payload-fields)))
    (type $alert-payload-fields (record (field "alert-id" (option u8)) (field "alert-message" (option string))))
    (export "TLS-alert-received-payload" (type $alert-payload (eq $alert-payload-fields)))
    (type $field-size-fields (record (field "field-name" (option string)) (field "field-size" (option u32))))
    (export "field-size-payload" (type $field-size (eq $field-size-fields)))
    (type $error-code-cases (variant
      (case "DNS-timeout") (case "DNS-error" $dns-payload)
      (case "destination-not-found") (case "destination-unavailable")
      (case "destination-IP-prohibited") (case "destination-IP-unroutable")
      (case "connection-refused") (case "connection-terminated") (case "connection-timeout")
      (case "connection-read-timeout") (case "connection-write-timeout") (case "connection-limit-reached")
      (case "TLS-protocol-error") (case "TLS-certificate-error") (case "TLS-alert-received" $alert-payload)
      (case "HTTP-request-denied") (case "HTTP-request-length-required")
      (case "HTTP-request-body-size" (option u64))
      (case "HTTP-request-method-invalid") (case "HTTP-request-URI-invalid") (case "HTTP-request-URI-too-long")
      (case "HTTP-request-header-section-size" (option u32)) (case "HTTP-request-header-size" (option $field-size))
      (case "HTTP-request-trailer-section-size" (option u32)) (case "HTTP-request-trailer-size" $field-size)
      (case "HTTP-response-incomplete")
      (case "HTTP-response-header-section-size" (option u32)) (case "HTTP-response-header-size" $field-size)
      (case "HTTP-response-body-size" (option u64))
      (case "HTTP-response-trailer-section-size" (option u32)) (case "HTTP-response-trailer-size" $field-size)
      (case "HTTP-response-transfer-coding" (option string)) (case "HTTP-response-content-coding" (option string))
      (case "HTTP-response-timeout") (case "HTTP-upgrade-failed") (case "HTTP-protocol-error")
      (case "loop-detected") (case "configuration-error") (case "internal-error" (option string))))
    (export "error-code" (type $error-code (eq $error-code-cases)))
    (export "[method]fields.append" (func
      (param "self" (borrow $fields)) (param "name" string) (param "value" (list u8))
      (result (result (error $header-error)))))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[constructor]outgoing-response" (func (param "headers" (own $fields)) (result (own $outgoing-response))))
    (export "[method]outgoing-response.set-status-code" (func
      (param "self" (borrow $outgoing-response)) (param "status-code" u16) (result (result))))
    (export "[static]response-outparam.set" (func
      (param "param" (own $response-outparam))
      (param "response" (result (own $outgoing-response) (error $error-code)))))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core module $memory-module
    (memory (export "memory") 1))
  (core instance $memory (instantiate $memory-module))
  (alias core export $memory "memory" (core memory $shared))
  (core func $fields-append (canon lower (func $http "[method]fields.append") (memory $shared)))
  (core func $fields-new (canon lower (func $http "[constructor]fields")))
  (core func $response-new (canon lower (func $http "[constructor]outgoing-response")))
  (core func $set-status (canon lower (func $http "[method]outgoing-response.set-status-code")))
  (core func $outparam-set (canon lower (func $http "[static]response-outparam.set") (memory $shared)))

  (core module $main-module
    (import "memory" "memory" (memory 1))
    (import "host" "fields-append" (func $fields-append (param $fields i32) (param $name i32) (param $name-len i32)
      (param $value i32) (param $value-len i32) (param $ret i32)))
    (import "host" "fields-new" (func $fields-new (result i32)))
    (import "host" "response-new" (func $response-new (param $headers i32) (result i32)))
    (import "host" "set-status" (func $set-status (param $response i32) (param $status i32) (result i32)))
    (import "host" "outparam-set" (func $outparam-set
      (param $out i32) (param $is-error i32) (param $response-or-error i32)
      (param i32) (param i64) (param i32) (param i32) (param i32) (param i32)))
    ;; Length and text of a name, length and text of its value, and 0 for invalid or 1 for forbidden; 255 ends them.
    (data (i32.const 1024)
      "\05x-own\0ca\0d\0aforged: 1\00"
      "\05x-own\03a\0ab\00"
      "\05x-own\03a\00b\00"
      "\04x\0d\0ay\011\00"
      "\03x y\011\00"
      "\00\011\00"
      "\0aconnection\05close\01"
      "\0akeep-alive\011\01"
      "\11transfer-encoding\07chunked\01"
      "\07upgrade\09websocket\01"
      "\10proxy-connection\05close\01"
      "\04host\01a\01"
      "\ff")

    ;; Answers with a status and without a body.
    (func $answer (param $out i32) (param $status i32)
      (local $response i32)
      (local.set $response (call $response-new (call $fields-new)))
      (if (call $set-status (local.get $response) (local.get $status)) (then unreachable))
      (call $outparam-set (local.get $out) (i32.const 0) (local.get $response)
        (i32.const 0) (i64.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))

    (func (export "handle") (param $request i32) (param $out i32)
      (local $fields i32) (local $name i32) (local $value i32)
      (local.set $fields (call $fields-new))
      (local.set $name (i32.const 1024))
      (block $all (loop $next
        (br_if $all (i32.eq (i32.load8_u (local.get $name)) (i32.const 255)))
        (local.set $value (call $behind (local.get $name)))
        (call $fields-append (local.get $fields)
          (i32.add (local.get $name) (i32.const 1)) (i32.load8_u (local.get $name))
          (i32.add (local.get $value) (i32.const 1)) (i32.load8_u (local.get $value)) (i32.const 0))
        (if (i32.eqz (i32.load8_u (i32.const 0))) (then unreachable))
        (local.set $name (call $behind (local.get $value)))
        (if (i32.ne (i32.load8_u (i32.const 1)) (i32.load8_u (local.get $name))) (then unreachable))
        (local.set $name (i32.add (local.get $name) (i32.const 1)))
        (br $next)))
      (call $answer (local.get $out) (i32.const 204)))

    ;; What stands behind a length and its text.
    (func $behind (param $at i32) (result i32)
      (i32.add (i32.add (local.get $at) (i32.const 1)) (i32.load8_u (local.get $at))))
  )
  (core instance $main (instantiate $main-module
    (with "memory" (instance $memory))
    (with "host" (instance
      (export "fields-append" (func $fields-append))
      (export "fields-new" (func $fields-new))
      (export "response-new" (func $response-new))
      (export "set-status" (func $set-status))
      (export "outparam-set" (func $outparam-set))
    ))
  ))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
