;; Asks for its path and points the host to the last bytes of the address space to put it.
(component $guest
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type $incoming-request (sub resource)))
    (export "response-outparam" (type (sub resource)))
    (export "[method]incoming-request.path-with-query" (func
      (param "self" (borrow $incoming-request)) (result (option string))))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core module $memory-module
    (memory (export "memory") 1)
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const -16)))
  (core instance $memory (instantiate $memory-module))
  (alias core export $memory "memory" (core memory $shared))
  (alias core export $memory "realloc" (core func $realloc))
  (core func $path (canon lower (func $http "[method]incoming-request.path-with-query")
    (memory $shared) (realloc $realloc)))

  (core module $main-module
    (import "memory" "memory" (memory 1))
    (import "host" "path" (func $path (param $request i32) (param $ret i32)))

    (func (export "handle") (param $request i32) (param $out i32)
      (call $path (local.get $request) (i32.const 0))
      unreachable)
  )
  (core instance $main (instantiate $main-module
    (with "memory" (instance $memory))
    (with "host" (instance
      (export "path" (func $path))
    ))
  ))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
