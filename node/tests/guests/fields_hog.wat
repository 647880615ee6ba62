;; Creates fields for ever, drops none, and fills each with 112 KiB: more would be refused.
(component $guest
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type (sub resource)))
    (export "fields" (type $fields (sub resource)))
    (export "response-outparam" (type (sub resource)))
    (type $header-error-cases (variant (case "invalid-syntax") (case "forbidden") (case "immutable")))
    (export "header-error" (type $header-error (eq $header-error-cases)))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[method]fields.append" (func
      (param "self" (borrow $fields)) (param "name" string) (param "value" (list u8))
      (result (result (error $header-error)))))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core module $memory-module
    (memory (export "memory") 1))
  (core instance $memory (instantiate $memory-module))
  (alias core export $memory "memory" (core memory $shared))
  (core func $fields-new (canon lower (func $http "[constructor]fields")))
  (core func $fields-append (canon lower (func $http "[method]fields.append") (memory $shared)))

  (core module $main-module
    (import "memory" "memory" (memory 1))
    (import "host" "fields-new" (func $fields-new (result i32)))
    (import "host" "fields-append" (func $fields-append (param $fields i32) (param $name i32) (param $name-len i32)
      (param $value i32) (param $value-len i32) (param $ret i32)))
    (data (i32.const 1024) "x-wide")

    (func (export "handle") (param $request i32) (param $out i32)
      (local $fields i32) (local $left i32)
      (memory.fill (i32.const 4096) (i32.const 120) (i32.const 16384))
      (loop $more
        (local.set $fields (call $fields-new))
        (local.set $left (i32.const 7))
        (loop $fill
          (call $fields-append (local.get $fields)
            (i32.const 1024) (i32.const 6) (i32.const 4096) (i32.const 16384) (i32.const 0))
          (if (i32.load8_u (i32.const 0)) (then unreachable))
          (local.set $left (i32.sub (local.get $left) (i32.const 1)))
          (br_if $fill (local.get $left)))
        (br $more)))
  )
  (core instance $main (instantiate $main-module
    (with "memory" (instance $memory))
    (with "host" (instance
      (export "fields-new" (func $fields-new))
      (export "fields-append" (func $fields-append))
    ))
  ))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
