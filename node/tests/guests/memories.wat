;; Has two memories of 96 MiB each from the start, neither large alone; traps if it comes to run.
(component $guest
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core module $memory-module (memory (export "memory") 1536))
  (core instance (instantiate $memory-module))
  (core instance (instantiate $memory-module))

  (core module $main-module
    (func (export "handle") (param $request i32) (param $out i32)
      unreachable)
  )
  (core instance $main (instantiate $main-module))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
