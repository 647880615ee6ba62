;; Calls itself until the stack ends.
(component $guest
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core module $main-module
    (func $deep (param $depth i32) (result i32)
      ;; The addition keeps this from being a loop.
      (i32.add (local.get $depth) (call $deep (i32.add (local.get $depth) (i32.const 1)))))
    (func (export "handle") (param $request i32) (param $out i32)
      (drop (call $deep (i32.const 0)))
      unreachable)
  )
  (core instance $main (instantiate $main-module))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
