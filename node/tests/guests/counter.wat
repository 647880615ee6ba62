;; Counts its requests in a global and answers 200 with the count, one digit. What it does besides that, the first letter
;; of the path says (README.md).
(component $guest
  (import "wasi:io/error@0.2.0" (instance $io-error
    (export "error" (type (sub resource)))
  ))
  (alias export $io-error "error" (type $io-error-resource))
  (import "wasi:io/streams@0.2.0" (instance $io-streams
    (alias outer $guest $io-error-resource (type $error-outer))
    (export "error" (type $error (eq $error-outer)))
    (export "output-stream" (type $output-stream (sub resource)))
    (type $stream-error-cases (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error-cases)))
    (export "[method]output-stream.blocking-write-and-flush" (func
      (param "self" (borrow $output-stream)) (param "contents" (list u8))
      (result (result (error $stream-error)))))
  ))
  (alias export $io-streams "output-stream" (type $output-stream))
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type $incoming-request (sub resource)))
    (export "fields" (type $fields (sub resource)))
    (export "outgoing-body" (type $outgoing-body (sub resource)))
    (export "outgoing-response" (type $outgoing-response (sub resource)))
    (export "response-outparam" (type $response-outparam (sub resource)))
    (alias outer $guest $output-stream (type $output-stream-outer))
    (export "output-stream" (type $output-stream (eq $output-stream-outer)))
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
    (export "[method]incoming-request.path-with-query" (func
      (param "self" (borrow $incoming-request)) (result (option string))))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[constructor]outgoing-response" (func (param "headers" (own $fields)) (result (own $outgoing-response))))
    (export "[method]outgoing-response.body" (func
      (param "self" (borrow $outgoing-response)) (result (result (own $outgoing-body)))))
    (export "[method]outgoing-body.write" (func
      (param "self" (borrow $outgoing-body)) (result (result (own $output-stream)))))
    (export "[static]outgoing-body.finish" (func
      (param "this" (own $outgoing-body)) (param "trailers" (option (own $fields)))
      (result (result (error $error-code)))))
    (export "[static]response-outparam.set" (func
      (param "param" (own $response-outparam))
      (param "response" (result (own $outgoing-response) (error $error-code)))))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))
  (alias export $http "outgoing-body" (type $outgoing-body))

  (core module $memory-module
    (memory (export "memory") 1)
    ;; Only the path comes as a string, and it is short.
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 16384)))
  (core instance $memory (instantiate $memory-module))
  (alias core export $memory "memory" (core memory $shared))
  (alias core export $memory "realloc" (core func $realloc))
  (core func $path (canon lower (func $http "[method]incoming-request.path-with-query")
    (memory $shared) (realloc $realloc)))
  (core func $request-drop (canon resource.drop $incoming-request))
  (core func $body-drop (canon resource.drop $outgoing-body))
  (core func $fields-new (canon lower (func $http "[constructor]fields")))
  (core func $response-new (canon lower (func $http "[constructor]outgoing-response")))
  (core func $response-body (canon lower (func $http "[method]outgoing-response.body") (memory $shared)))
  (core func $body-write (canon lower (func $http "[method]outgoing-body.write") (memory $shared)))
  (core func $body-finish (canon lower (func $http "[static]outgoing-body.finish")
    (memory $shared) (realloc $realloc)))
  (core func $outparam-set (canon lower (func $http "[static]response-outparam.set")
    (memory $shared)))
  (core func $stream-write (canon lower (func $io-streams "[method]output-stream.blocking-write-and-flush")
    (memory $shared)))
  (core func $stream-drop (canon resource.drop $output-stream))

  (core module $main-module
    (import "memory" "memory" (memory 1))
    (import "host" "path" (func $path (param $request i32) (param $ret i32)))
    (import "host" "request-drop" (func $request-drop (param $request i32)))
    (import "host" "body-drop" (func $body-drop (param $body i32)))
    (import "host" "fields-new" (func $fields-new (result i32)))
    (import "host" "response-new" (func $response-new (param $headers i32) (result i32)))
    (import "host" "response-body" (func $response-body (param $response i32) (param $ret i32)))
    (import "host" "body-write" (func $body-write (param $body i32) (param $ret i32)))
    (import "host" "body-finish" (func $body-finish
      (param $body i32) (param $has-trailers i32) (param $trailers i32) (param $ret i32)))
    (import "host" "outparam-set" (func $outparam-set
      (param $out i32) (param $is-error i32) (param $response-or-error i32)
      (param i32) (param i64) (param i32) (param i32) (param i32) (param i32)))
    (import "host" "stream-write" (func $stream-write (param $stream i32) (param $ptr i32) (param $len i32) (param $ret i32)))
    (import "host" "stream-drop" (func $stream-drop (param $stream i32)))

    ;; Sends the status line (200) and the given headers; leaves body and stream open.
    (global $count (mut i32) (i32.const 0))
    (global $body (mut i32) (i32.const 0))
    (global $stream (mut i32) (i32.const 0))
    (func $begin (param $out i32) (param $headers i32)
      (local $response i32)
      (local.set $response (call $response-new (local.get $headers)))
      (call $response-body (local.get $response) (i32.const 0))
      (global.set $body (call $ok (i32.const 4)))
      (call $body-write (global.get $body) (i32.const 0))
      (global.set $stream (call $ok (i32.const 4)))
      (call $outparam-set (local.get $out) (i32.const 0) (local.get $response)
        (i32.const 0) (i64.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))

    ;; The payload of the result at address 0, or a trap when it is an error.
    (func $ok (param $payload i32) (result i32)
      (if (i32.load8_u (i32.const 0)) (then unreachable))
      (i32.load (local.get $payload)))

    (func $write (param $ptr i32) (param $len i32)
      (call $stream-write (global.get $stream) (local.get $ptr) (local.get $len) (i32.const 0))
      (drop (call $ok (i32.const 4))))

    (func $finish
      (call $stream-drop (global.get $stream))
      (call $body-finish (global.get $body) (i32.const 0) (i32.const 0) (i32.const 0))
      (drop (call $ok (i32.const 8))))

    (func (export "handle") (param $request i32) (param $out i32)
      (local $letter i32) (local $chunks i32)
      (global.set $count (i32.add (global.get $count) (i32.const 1)))
      ;; option<string> at 0: is-some, then pointer at 4 and length at 8. After "/" comes the letter, or nothing.
      (call $path (local.get $request) (i32.const 0))
      (if (i32.gt_u (i32.load (i32.const 8)) (i32.const 1)) (then
        (local.set $letter (i32.load8_u (i32.add (i32.load (i32.const 4)) (i32.const 1))))))
      (if (i32.ne (local.get $letter) (i32.const 107)) (then ;; k: keeps the handle of the request
        (call $request-drop (local.get $request))))
      (if (i32.eq (local.get $letter) (i32.const 116)) (then unreachable)) ;; t: traps
      (if (i32.eq (local.get $letter) (i32.const 98)) (then (loop $ever (br $ever)))) ;; b: burns
      (if (i32.eq (local.get $letter) (i32.const 103)) (then ;; g: grows by 2 MiB
        (if (i32.eq (memory.grow (i32.const 32)) (i32.const -1)) (then unreachable))))
      (if (i32.eq (local.get $letter) (i32.const 104)) (then ;; h: hoards until refused, and gets over it
        (loop $more (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))))
      (call $begin (local.get $out) (call $fields-new))
      (if (i32.eq (local.get $letter) (i32.const 115)) (then ;; s: streams for ever
        (loop $again (call $write (i32.const 4096) (i32.const 4096)) (br $again))))
      (if (i32.eq (local.get $letter) (i32.const 108)) (then ;; l: a long body, 64 chunks before the count
        (loop $next
          (call $write (i32.const 4096) (i32.const 4096))
          (local.set $chunks (i32.add (local.get $chunks) (i32.const 1)))
          (br_if $next (i32.lt_u (local.get $chunks) (i32.const 64))))))
      (i32.store8 (i32.const 1024) (i32.add (i32.const 48) (global.get $count)))
      (call $write (i32.const 1024) (i32.const 1))
      (if (i32.eq (local.get $letter) (i32.const 117)) (then ;; u: leaves the body unfinished
        (call $stream-drop (global.get $stream))
        (call $body-drop (global.get $body))
        return))
      (call $finish))
  )
  (core instance $main (instantiate $main-module
    (with "memory" (instance $memory))
    (with "host" (instance
      (export "path" (func $path))
      (export "request-drop" (func $request-drop))
      (export "body-drop" (func $body-drop))
      (export "fields-new" (func $fields-new))
      (export "response-new" (func $response-new))
      (export "response-body" (func $response-body))
      (export "body-write" (func $body-write))
      (export "body-finish" (func $body-finish))
      (export "outparam-set" (func $outparam-set))
      (export "stream-write" (func $stream-write))
      (export "stream-drop" (func $stream-drop))
    ))
  ))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
